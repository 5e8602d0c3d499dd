"""Looking at shared networks: how alike their layers are, what they cost, pictures."""
