"""Regions whose router, dispatch and experts are written into one method: recorded, matched, proven, replayed."""
