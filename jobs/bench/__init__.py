"""Benchmarks: one file per measured claim. Each prints one JSON object with ratios of medians."""
