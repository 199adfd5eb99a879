"""What tests share: small stores, cohorts and models, commands run in this process. No tests here."""
