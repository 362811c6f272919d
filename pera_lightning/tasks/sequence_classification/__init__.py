"""Classification of sentences and pairs with encoders of transformers: GLUE, and files of one's own."""
