"""Views: what one kind of connection sees. The catalogue of what exists, the compiled view, its frames on the wire."""
