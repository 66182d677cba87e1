"""Pages that need nothing else, and what a report and the views of a notebook share: style, scripts, grids."""
