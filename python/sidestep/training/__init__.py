"""Training of the model that ships: pictures, captions and the loop (`sidestep train`)."""
