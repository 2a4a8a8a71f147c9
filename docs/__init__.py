"""Examples that run, beside what one looks up."""
