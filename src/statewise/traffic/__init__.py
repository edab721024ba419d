"""Requests sent to a server in a known pattern, and what came of them. Nothing here needs the engine or torch."""
