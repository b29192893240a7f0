"""The models that ship with svdd, and `hub.py`, which loads others from a folder, a file or the hub."""
