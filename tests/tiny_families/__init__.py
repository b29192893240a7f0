"""Small random pipelines with the component classes and scheduler configurations of the published models."""
