"""Turns titles into URL slugs."""


def slug(title):
    """Return title in lower case, its words joined by single hyphens."""
    return title.lower().replace(" ", "-")
