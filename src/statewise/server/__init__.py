"""Statewise over HTTP: an application that speaks OpenAI's API, and what stands guard before it."""
