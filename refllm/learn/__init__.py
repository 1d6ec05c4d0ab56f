"""What helps to understand the models and the reports: so far a glossary."""
