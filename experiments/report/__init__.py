"""What results say: statistics, tables, figures."""
