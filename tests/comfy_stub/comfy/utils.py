"""The progress bar."""

PROGRESS_BAR_ENABLED = True
updates = []  # (value, total) of every bar


class ProgressBar:
    def __init__(self, total, node_id=None):
        self.total = total

    def update_absolute(self, value, total=None, preview=None):
        updates.append((value, total or self.total))
