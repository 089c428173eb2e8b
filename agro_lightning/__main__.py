from agro_lightning.commands.main import main

if __name__ == "__main__":
    main()
