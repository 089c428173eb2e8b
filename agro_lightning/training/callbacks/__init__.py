"""What watches a run: guards, logs, samples, summaries."""
