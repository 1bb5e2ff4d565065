"""Stage three: labels, test protocol, metrics, comparison and fusion."""
