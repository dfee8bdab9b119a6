"""Conversations: what a process keeps of an open conversation; how it is opened, kept current and evicted."""
