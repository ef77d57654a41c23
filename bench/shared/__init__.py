"""What every benchmark uses: one timer, one row, one rule for 'equal', one table printer, common options."""
