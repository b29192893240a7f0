"""What several rewards share: models, image preprocessing, requests to endpoints."""
