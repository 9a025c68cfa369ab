"""Request bodies before anybody knows what they say: who may send one, how large, how deep."""
