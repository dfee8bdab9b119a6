"""The library: which conversations there are, what they are called, and how they are searched, copied and moved."""

from broker.library.library import ConversationInfo, Library, ListPage
from broker.library.store import ForkedFrom, LibraryEntry, LibraryStore

__all__ = ["ConversationInfo", "ForkedFrom", "Library", "LibraryEntry", "LibraryStore", "ListPage"]
