"""Views of a report: text, page, figures."""
