"""The peer policies: their slow references on numbers worked out by hand, and the product against them."""
