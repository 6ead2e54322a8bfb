"""What people look at: `pictures` shows volumes and makes previews, `report` is the page that `evaluate` writes."""
