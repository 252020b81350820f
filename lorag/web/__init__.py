"""The page (extra `web`): workbench computes, drawings draw, page lays out, serving lets in."""
