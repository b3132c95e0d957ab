"""Number formats, memory formats, wrappers and adapters that models come in."""
