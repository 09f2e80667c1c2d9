"""Tokens on disk and in motion: shard format, fetching, checking, tokenising, the stream. Imports nothing of ours."""
