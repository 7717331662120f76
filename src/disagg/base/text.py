"""Text from elsewhere on its way into a log or onto a terminal."""


def one_line(text: str) -> str:
    r"""Return ``text`` with everything that is no visible character or space escaped, as in ``a\nb``.

    So no text can begin a line of its own in a log, or send a terminal commands.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
