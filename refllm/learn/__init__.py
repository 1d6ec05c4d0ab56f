"""What helps to understand the models and the reports: exercises with a coach, and a glossary."""
