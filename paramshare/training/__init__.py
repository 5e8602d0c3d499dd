"""Training: configuration, step, state, checkpoints, loop. Not imported by `import paramshare`."""

import paramshare.tasks  # noqa: F401 (first: it names the extra that a bare install lacks)
