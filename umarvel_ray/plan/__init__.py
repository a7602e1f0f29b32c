"""What a run costs before it runs: operations, bytes, memory and time of every job, and how they grow."""
