"""One file a measured claim; each prints JSON with ratios of medians."""
