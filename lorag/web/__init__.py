"""The page (extra `web`): session computes, drawings draw, page lays out, serving lets in."""
