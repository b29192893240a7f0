"""The models that ship with svdd, and `hub.py`, which finds every other one: in a folder, a file or on the hub."""
