"""What a terminal shows while a command works, and how its tables fit: progress, the status line, the streams."""
