"""The report page of a run, charts and pictures."""

import paramshare.tasks  # noqa: F401 (first: it names the extra that a bare install lacks)
