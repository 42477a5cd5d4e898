plugins {
    id("com.android.application") version "8.7.3"
    id("org.jetbrains.kotlin.android") version "2.0.21"
}

android {
    namespace = "example"
    compileSdk = 35
    defaultConfig {
        applicationId = "example.model"
        minSdk = 24
        targetSdk = 35
        versionCode = 1
        versionName = "1"
    }
    // The model and the sample are assets as they lie beside this folder.
    sourceSets["main"].assets.srcDirs("../model", "../sample")
    androidResources {
        noCompress += listOf("onnx", "ort", "bin", "data")
        ignoreAssetsPattern = "!*.ort:!*.config"
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}

dependencies {
    implementation(@@{package})
}
