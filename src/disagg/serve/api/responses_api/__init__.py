"""OpenAI's ``/v1/responses``, stateless: its requests as chats, and chats' answers as its items and events."""
