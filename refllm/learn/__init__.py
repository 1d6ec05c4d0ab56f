"""What helps to understand the models and the reports: exercises with a coach, a glossary, and the book."""
