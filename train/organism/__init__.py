"""The nano organism: a world of persona-consistent chats and tiny models trained on it from scratch."""
