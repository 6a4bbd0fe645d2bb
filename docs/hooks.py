"""What mkdocs calls while it builds the site."""


def on_page_content(html, **kwargs):
    """Docstrings open a literal block with `::`, which Markdown would show."""
    del kwargs
    return html.replace("::</p>", ":</p>")
