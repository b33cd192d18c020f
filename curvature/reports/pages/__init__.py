"""How a report is shown: text, page, figures."""
