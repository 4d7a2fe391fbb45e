"""Where islands meet: records in a folder, or the same records served over TCP by a launcher. Needs no torch."""
