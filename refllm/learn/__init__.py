"""What helps to understand the models and the reports: a glossary, and the book."""
