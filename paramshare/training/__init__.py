"""Training: data, one pure step, state, checkpoints, the loop. Imported on demand; `import paramshare` leaves it alone."""
