"""The page of `globe report`: facts, figures, and the template that shows them."""
