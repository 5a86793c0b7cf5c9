"""The ops, one module each at ``<family>/<op>.py``. Importing ``tilefuse`` defines all of them."""
