"""Small enough to ship: networks, the scenes they know, words, weights, training, the judge."""
