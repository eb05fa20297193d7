"""Carry out a plan: write, verify and publish shards, in a folder or on the Hub."""
