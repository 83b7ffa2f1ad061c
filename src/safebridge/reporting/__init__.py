"""What every report shares: charts, output folders, progress bars, and the facts of a run."""
