"""What it takes to compare policies with the dense model: assets, tasks, runs, report."""
