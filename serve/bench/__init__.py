"""One file a measured claim about serving; each prints one JSON object."""
